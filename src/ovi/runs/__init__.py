"""Folders of runs, read: what they hold, tables of many, and what may be concluded from them."""
