"""Scripts that run in processes of their own (launch/preflight/node.py). They import nothing of ours."""
