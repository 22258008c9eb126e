"""DeSync: how far Synchformer hears sound and picture apart."""
