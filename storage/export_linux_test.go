package storage

// ForceDirectAlign makes a direct file work in larger units than the host needs, so that a disk with large sectors can
// be tested without one.
func ForceDirectAlign(f *OSFile, align int64) {
	f.direct.align = max(f.direct.align, align)
}

// OpenRootBeneath is OpenBeneath as on a kernel without openat2.
func OpenRootBeneath(root, rel string, o OpenOptions) (*OSFile, error) {
	fd, err := openRootBeneath(root, rel, o)
	if err != nil {
		return nil, err
	}
	return newOSFile(fd, rel, o)
}
