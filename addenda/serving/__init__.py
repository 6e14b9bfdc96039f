"""Serving the combined model of all registered tasks over HTTP."""
