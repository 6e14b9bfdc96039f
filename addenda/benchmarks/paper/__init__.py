"""The paper's comparison on any image folders: its regimes, masked and not, beside LoRA and full fine-tuning."""
