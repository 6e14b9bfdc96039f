"""Exports the combined model of some tasks to one file that runs without Addenda (torch.export or ONNX)."""

from addenda.exporting.export import FORMATS, Exported, export_model

__all__ = ["FORMATS", "Exported", "export_model"]
