package qcow2

import (
	"sync"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// clusterCache keeps decompressed clusters, found by the L2 entry that describes them. An entry names host bytes, so a
// cluster stays right until those bytes are given to somebody else: drop is called when they become free, at a moment
// when no request that could still put the old content in is running.
type clusterCache struct {
	mu    sync.Mutex
	byKey map[format.L2Entry]*cachedCluster
	clock []*cachedCluster
	hand  int
	most  int
	// free are buffers of clusters that went: without them every cluster that is read once would be garbage to collect.
	free [][]byte
	size int64 // of a cluster
}

// maxFree is how many buffers wait for their next use.
const maxFree = 8

type cachedCluster struct {
	key   format.L2Entry
	used  bool
	ready chan struct{} // closed when err is set and data filled
	data  []byte
	err   error

	// Guarded by clusterCache.mu. A buffer is used again once its cluster has left the clock and the last user is done: from
	// then on nobody can find it.
	users int
	gone  bool
}

func newClusterCache(bytes, clusterSize int64) *clusterCache {
	return &clusterCache{byKey: make(map[format.L2Entry]*cachedCluster), most: int(max(bytes/clusterSize, 2)), size: clusterSize}
}

// read copies what the cluster of an entry has from in on to p, calling load to fill it once however many ask at the same time.
func (c *clusterCache) read(key format.L2Entry, p []byte, in int64, load func(dst []byte) error) error {
	c.mu.Lock()
	e, ok := c.byKey[key]
	if !ok {
		e = &cachedCluster{key: key, ready: make(chan struct{}), data: c.buffer()}
		c.byKey[key] = e
		c.admit(e)
	}
	e.used = e.used || ok
	e.users++
	c.mu.Unlock()
	if ok {
		<-e.ready
	} else {
		e.err = load(e.data)
		close(e.ready)
	}
	err := e.err
	if err == nil {
		copy(p, e.data[in:])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.forget(e)
	}
	c.done(e)
	return err
}

// peek is read for a cluster that is there already. It reports whether it is.
func (c *clusterCache) peek(key format.L2Entry, p []byte, in int64) bool {
	c.mu.Lock()
	e, ok := c.byKey[key]
	if !ok || !e.filled() {
		c.mu.Unlock()
		return false
	}
	e.used = true
	e.users++
	c.mu.Unlock()
	copy(p, e.data[in:])
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done(e)
	return true
}

// filled reports whether a cluster is there as it should be.
func (e *cachedCluster) filled() bool {
	select {
	case <-e.ready:
		return e.err == nil
	default:
		return false
	}
}

// buffer returns memory for a cluster; mu is held.
func (c *clusterCache) buffer() []byte {
	if n := len(c.free) - 1; n >= 0 {
		b := c.free[n]
		c.free = c.free[:n]
		return b
	}
	return make([]byte, c.size)
}

// done ends a use of a cluster; mu is held.
func (c *clusterCache) done(e *cachedCluster) {
	e.users--
	c.reuse(e)
}

// leave is told that a cluster is in the clock no more; mu is held.
func (c *clusterCache) leave(e *cachedCluster) {
	e.gone = true
	c.reuse(e)
}

// reuse keeps the buffer of a cluster that nobody can find and nobody uses; mu is held.
func (c *clusterCache) reuse(e *cachedCluster) {
	if !e.gone || e.users > 0 {
		return
	}
	if len(c.free) < maxFree {
		c.free = append(c.free, e.data)
	}
	e.data = nil
}

// has reports whether a cluster is there or on its way.
func (c *clusterCache) has(key format.L2Entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.byKey[key]
	return ok
}

// admit puts e into the clock, in place of one that was not used lately; mu is held.
func (c *clusterCache) admit(e *cachedCluster) {
	if len(c.clock) < c.most {
		c.clock = append(c.clock, e)
		return
	}
	for {
		c.hand = (c.hand + 1) % len(c.clock)
		old := c.clock[c.hand]
		if old.used {
			old.used = false
			continue
		}
		if c.byKey[old.key] == old {
			delete(c.byKey, old.key)
		}
		c.leave(old)
		c.clock[c.hand] = e
		return
	}
}

// forget takes e out of the index; its place in the clock is reused in time. mu is held.
func (c *clusterCache) forget(e *cachedCluster) {
	if c.byKey[e.key] == e {
		delete(c.byKey, e.key)
	}
	e.used = false
}

// drop forgets every cluster that lies in a run of host clusters.
func (c *clusterCache) drop(lay format.Layout, r meta.ClusterRun) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, e := range c.byKey {
		first, last := lay.CompressedClusters(key)
		if first < r.End() && last >= r.First {
			c.forget(e)
		}
	}
}

// clear forgets everything.
func (c *clusterCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.byKey)
	for _, e := range c.clock {
		c.leave(e)
	}
	clear(c.clock)
	c.clock, c.hand = c.clock[:0], 0
}
