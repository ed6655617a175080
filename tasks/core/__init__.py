"""What every stage and the flow share, free of torch: refs, store, commands, child processes, tracking."""
