package qcow2

import (
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
)

// cacheCluster is how large the clusters of these tests are.
const cacheCluster = 4096

func fillCluster(key format.L2Entry) func(dst []byte) error {
	return func(dst []byte) error {
		for i := range dst {
			dst[i] = byte(key)
		}
		return nil
	}
}

// TestClusterCacheBuffers has many read clusters through a cache that has room for few, while others drop and clear them: each
// finds what it asked for, though the memory of clusters that went is used for those that come.
func TestClusterCacheBuffers(t *testing.T) {
	c := newClusterCache(4*cacheCluster, cacheCluster)
	lay := format.Layout{ClusterBits: 12, Version: format.Version3}
	failure := errors.New("cannot be read")
	var wg sync.WaitGroup
	for seed := range uint64(6) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			p := make([]byte, cacheCluster)
			for range 3000 {
				key := format.L2Entry(1 + r.IntN(12))
				in := int64(r.IntN(cacheCluster))
				switch part := p[in:]; r.IntN(20) {
				case 0:
					c.drop(lay, meta.ClusterRun{First: 0, N: 1})
				case 1:
					c.clear()
				case 2:
					err := c.read(key, part, in, func([]byte) error { return failure })
					if err != nil && !errors.Is(err, failure) {
						t.Errorf("%v", err)
					}
				case 3, 4, 5:
					if c.peek(key, part, in) {
						sameCluster(t, part, key)
					}
				default:
					err := c.read(key, part, in, fillCluster(key))
					switch {
					case err == nil:
						sameCluster(t, part, key)
					case !errors.Is(err, failure): // somebody else's
						t.Errorf("%v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.free) > maxFree || len(c.clock) > c.most || len(c.byKey) > len(c.clock) {
		t.Errorf("%d buffers are free, %d clusters in the clock, %d in the index", len(c.free), len(c.clock), len(c.byKey))
	}
	seen := make(map[*byte]bool)
	for _, b := range c.free {
		seen[&b[0]] = true
	}
	for _, e := range c.clock {
		if e.users != 0 || e.gone || seen[&e.data[0]] {
			t.Errorf("cluster %d: %d users, gone %v, its memory is another's: %v", e.key, e.users, e.gone, seen[&e.data[0]])
		}
		seen[&e.data[0]] = true
	}
}

func sameCluster(t *testing.T, p []byte, key format.L2Entry) {
	t.Helper()
	for _, b := range p {
		if b != byte(key) {
			t.Errorf("a byte of cluster %d is %d", key, b)
			return
		}
	}
}

// TestClusterCacheAllocates: reading one cluster after the other takes no memory for each.
func TestClusterCacheAllocates(t *testing.T) {
	c := newClusterCache(4*cacheCluster, cacheCluster)
	p := make([]byte, cacheCluster)
	key := format.L2Entry(0)
	buffers := make(map[*byte]bool)
	for range 100 {
		key++
		err := c.read(key, p, 0, func(dst []byte) error {
			buffers[&dst[0]] = true
			return fillCluster(key)(dst)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(buffers) > c.most+1 {
		t.Errorf("%d buffers for a cache of %d clusters", len(buffers), c.most)
	}
}
