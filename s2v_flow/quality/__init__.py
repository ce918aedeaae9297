"""Figures of a finished video: lips and voice, drift, seams, pictures that show nothing. Needs no model's weights."""
