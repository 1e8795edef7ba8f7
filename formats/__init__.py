"""Other projects' spellings and files, translated: fairseq's and Hugging Face's."""
