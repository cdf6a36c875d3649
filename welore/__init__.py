"""Low-rank compression and fine-tuning of language models.

`import welore` is enough for `transformers.AutoModelForCausalLM.from_pretrained` to load a compressed model.
"""

from welore import checkpoint as checkpoint
