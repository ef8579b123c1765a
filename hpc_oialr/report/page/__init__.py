"""The report page: one HTML file that holds everything it shows."""
