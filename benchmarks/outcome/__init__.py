"""What evolving brings on whole training runs, beside every arm that keeps the claim honest."""
