"""Models split over processes that generate as transformers models do."""
