"""Questions that users ask of a split model, over every type: generating, and calls of each kind. All ranks run in
this process, a thread each, with the runtime of processes."""
