"""Distillation at real shapes on one GPU: our trainer and its parts beside the peers' loops.

    python -m tests.benchmarks.distill [layers] [loss] [parts] [peers] [job] [curve] [--rows short long] [--out DIR]
    python -m tests.benchmarks.distill quickstart         on the CPU
    python -m tests.benchmarks.distill.two                one GPU, and several: see there

    layers  the written-out layers' gradients against transformers' own layers
    loss    the loss alone: chunk sizes, its error against float64
    parts   our trainer at 128 rows a step, with packing, CUDA graphs, compilation and the written-out layers one by one
    peers   the seeds' loop, full logits batched, Liger's fused JSD, and ours at 8, 32 and 128 rows a step
    job     1 892 rows, 2 epochs, 32 rows a step: the teacher's pass, and the training steps on its states
    curve   validation KL against wall time for the seeds' loop, Liger's and ours: each row once, from the same start
    quickstart  the quickstart's bases and rows on the CPU, our trainer beside the seeds' loop and the batched one

Random weights of Gemma-3-1B (teacher) and Gemma-3-270M (student), vocabulary 262144, full fine-tune. Peers train
bfloat16 weights with fused AdamW, ours float32 weights under bfloat16 autocast. Short rows are 60 to 120 prompt and 30
to 60 completion tokens, long ones 2048 tokens with 512 to 768 of completion. `--pico` tries everything on tiny models.
"""
