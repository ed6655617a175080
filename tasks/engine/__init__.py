"""What stages that run torch share, a room a subject: data, models, weights, training, losses, memory, speed ..."""

import logging

# On CPUs with AVX512-BF16, importing bitsandbytes warns that a kernel of the hub is missing. It is not used:
# 4-bit weights stay as they are stored (tasks.engine.models.load).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
