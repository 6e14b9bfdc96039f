"""Task routing: feature statistics stored with each task, and the router that chooses a task for an image."""

from addenda.combined.routing.router import Choice, Router
from addenda.combined.routing.statistics import can_be_routed, feature_statistics, joined_statistics

__all__ = ["Choice", "Router", "can_be_routed", "feature_statistics", "joined_statistics"]
