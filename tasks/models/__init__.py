"""Loading, padding, LoRA on a CPU, the trainers of Hugging Face, and export.

Model code that knows no reward and no algorithm. `loading` has the one padding function and the position ids.
`onednn_linear` is measured and tested against torch and PEFT; keep it bit for bit.
"""
