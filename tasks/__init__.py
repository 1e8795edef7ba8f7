"""What labelled text needs on a pretrained encoder; pretraining knows nothing of it."""
