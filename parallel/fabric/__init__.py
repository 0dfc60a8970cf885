"""What joins the accelerators: its nominal speed by rule, its measured speed by fit, and its faults by comparison."""
