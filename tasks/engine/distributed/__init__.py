"""Several processes that train one model: ranks, FSDP2, gradient reduction."""
