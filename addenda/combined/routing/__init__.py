"""Which task an image is for: what tasks keep of their images, classifiers over it, and the router."""

from addenda.combined.routing.router import Choice, Router
from addenda.combined.routing.statistics import can_be_routed, feature_statistics

__all__ = ["Choice", "Router", "can_be_routed", "feature_statistics"]
