"""Post-training pruning: fewer weights in a trained model, chosen on calibration text."""
