"""What the tests of several folders share: tiny models, and servers in processes of their own."""
