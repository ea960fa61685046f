"""Why a model answers as it does: channels, places, and what excites them."""
