"""From media files to the clips worth encoding: small stages, each usable alone, chained by ``run_stages``."""
