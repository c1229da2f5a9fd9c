"""What every part needs: errors, folders written whole, progress, what the machine offers.

Imports nothing of turbosparse. Anything may import it.
"""
