"""GPT-2, its optimizer and the one step that trials measure and training runs."""
