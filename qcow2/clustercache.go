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
}

type cachedCluster struct {
	key   format.L2Entry
	used  bool
	ready chan struct{} // closed when data or err is set
	data  []byte
	err   error
}

func newClusterCache(bytes, clusterSize int64) *clusterCache {
	return &clusterCache{byKey: make(map[format.L2Entry]*cachedCluster), most: int(max(bytes/clusterSize, 2))}
}

// get returns the cluster of an entry, calling load once however many ask at the same time.
func (c *clusterCache) get(key format.L2Entry, load func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	if e, ok := c.byKey[key]; ok {
		e.used = true
		c.mu.Unlock()
		<-e.ready
		return e.data, e.err
	}
	e := &cachedCluster{key: key, ready: make(chan struct{})}
	c.byKey[key] = e
	c.admit(e)
	c.mu.Unlock()

	e.data, e.err = load()
	close(e.ready)
	if e.err != nil {
		c.mu.Lock()
		c.forget(e)
		c.mu.Unlock()
	}
	return e.data, e.err
}

// peek returns a cluster that is there already.
func (c *clusterCache) peek(key format.L2Entry) ([]byte, bool) {
	c.mu.Lock()
	e, ok := c.byKey[key]
	if ok {
		e.used = true
	}
	c.mu.Unlock()
	if !ok {
		return nil, false
	}
	select {
	case <-e.ready:
		return e.data, e.err == nil
	default:
		return nil, false
	}
}

// has reports whether a cluster is there or on its way.
func (c *clusterCache) has(key format.L2Entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.byKey[key]
	return ok
}

// admit puts e into the clock, in place of one that was not used lately; mu is held. Whoever still copies from an
// evicted cluster keeps it alive.
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
	clear(c.clock)
	c.clock, c.hand = c.clock[:0], 0
}
