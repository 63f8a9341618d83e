"""PEFT LoRA files beside the dequantized base that they belong to."""
