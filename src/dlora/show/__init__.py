"""What people see: tables, progress, pages and their pictures."""
