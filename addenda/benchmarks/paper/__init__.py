"""The paper's comparison on any image folders: its methods with and without the mask, LoRA and full fine-tuning."""
