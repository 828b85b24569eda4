"""The model that predicts a peak, and what it estimates for a card."""
