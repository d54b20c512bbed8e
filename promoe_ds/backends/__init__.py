"""DeepSpeed, Megatron-core and Transformer Engine: everything that touches an external engine."""
