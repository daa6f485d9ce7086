"""The wire: bytes to official messages and back; the only folder that knows HTTP."""
