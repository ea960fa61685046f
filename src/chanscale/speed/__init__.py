"""What this machine trains fastest with, found by trying: precision, memory layout, threads, workers."""
