"""CaSED: vocabulary-free classification by retrieval from a caption database."""
