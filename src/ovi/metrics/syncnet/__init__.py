"""LSE-C and LSE-D: how well lips and speech agree, by SyncNet."""
