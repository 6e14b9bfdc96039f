"""Throughput and latency of a server under load."""
