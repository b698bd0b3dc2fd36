package qcow2

// Usage is what an open image takes of this process, and what its file does not have yet.
type Usage struct {
	CacheBytes        int64 // L2 tables in memory
	ClusterCacheBytes int64 // decompressed clusters in memory
	// Unflushed: there are changes that a power cut could take back; a flush makes them durable.
	Unflushed bool
	// Dirty: the file says that its refcounts may be wrong; so they would be repaired if this process ended now.
	Dirty bool
	// Corrupt is why the image takes no changes any more, nil while it does.
	Corrupt error
}

// Usage returns what the image takes now. It waits for no request.
func (im *Image) Usage() (Usage, error) {
	t, err := im.enter()
	if err != nil {
		return Usage{}, err
	}
	defer im.meta.Epochs.Exit(t)
	m := im.meta.MemoryUse()
	return Usage{
		CacheBytes: m.CacheBytes, ClusterCacheBytes: im.clusters.bytes(im.lay.ClusterSize()),
		Unflushed: m.DirtyTables > 0 || m.Unsynced, Dirty: m.Marked, Corrupt: im.meta.Corrupt(),
	}, nil
}

// bytes is about how much the cache holds, of clusters of a size.
func (c *clusterCache) bytes(clusterSize int64) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int64(len(c.clock)) * clusterSize
}
