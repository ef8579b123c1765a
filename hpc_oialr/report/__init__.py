"""What a researcher looks at after a run: figures for a paper, and one page for the browser."""
