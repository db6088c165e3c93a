"""Routers, auxiliary losses, expert bank, and the dispatch/combine seam."""
