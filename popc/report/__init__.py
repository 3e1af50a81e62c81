"""What popc found and did, for people: tables, pages, figures."""
