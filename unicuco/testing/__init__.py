"""What tests and extensions share: tiny models, and contract classes for implementations."""

from unicuco.testing.importance import ImportanceMetricContract
from unicuco.testing.tiny import FAMILIES, tiny_model_folder

__all__ = ["FAMILIES", "ImportanceMetricContract", "tiny_model_folder"]
