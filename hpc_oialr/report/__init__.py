"""Figures for papers and one HTML page, from the folders of runs."""
