"""One GPU for each process that torchrun or accelerate started.

`import tasks` chooses it: the driver reads the choice once, and libraries ask it for cards while they are imported.
"""

import os


def take_card() -> None:
    """Leaves this process the visible card of its number; a second call changes nothing."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = visible.split(",") if visible else [str(local)] * (local + 1)
        if local < len(cards):
            os.environ["CUDA_VISIBLE_DEVICES"] = cards[local]
