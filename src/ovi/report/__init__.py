"""Reports of many runs: one page that opens offline, and tables for a paper."""
