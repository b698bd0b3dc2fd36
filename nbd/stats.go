package nbd

import (
	"slices"
	"time"
)

// Stats counts what a connection did, or all connections of an export.
type Stats struct {
	Requests     uint64 // of every kind, those below and others
	BytesRead    uint64 // by successful reads
	BytesWritten uint64 // by successful writes

	Reads, Writes, Flushes uint64
	Trims, Zeroes          uint64 // TRIM and WRITE_ZEROES
	Errors                 uint64 // requests that the device failed
}

func (s *Stats) add(o Stats) {
	s.Requests += o.Requests
	s.BytesRead += o.BytesRead
	s.BytesWritten += o.BytesWritten
	s.Reads += o.Reads
	s.Writes += o.Writes
	s.Flushes += o.Flushes
	s.Trims += o.Trims
	s.Zeroes += o.Zeroes
	s.Errors += o.Errors
}

// numKinds is the number of kinds that requests are counted by: the commands, and all that are none.
const numKinds = int(CmdBlockStatus) + 2

func kindOf(cmd Command) int { return min(int(cmd), numKinds-1) }

func (c *conn) stats() Stats {
	s := Stats{
		BytesRead: c.bytesRead.Load(), BytesWritten: c.bytesWritten.Load(), Errors: c.errors.Load(),
		Reads: c.ops[CmdRead].Load(), Writes: c.ops[CmdWrite].Load(), Flushes: c.ops[CmdFlush].Load(),
		Trims: c.ops[CmdTrim].Load(), Zeroes: c.ops[CmdWriteZeroes].Load(),
	}
	for i := range c.ops {
		s.Requests += c.ops[i].Load()
	}
	return s
}

// inflight is the number of requests in the hands of workers or on the way to the client.
func (c *conn) inflight() int {
	c.flow.Lock()
	defer c.flow.Unlock()
	return c.flow.inflight
}

// size is how long the disk is now.
func (x *export) size() int64 { return max(x.Device.Size(), 0) }

// Client describes a connection that uses an export.
type Client struct {
	Conn
	Stats
	Inflight int       // requests under way
	Size     int64     // of the disk, as the client was told when it connected
	Since    time.Time // when it connected
}

// Clients lists the connections that use an export, those included that a Provider offers, in the order in which they
// came.
func (s *Server) Clients() []Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Client
	for c := range s.conns {
		if c.exp == nil {
			continue // still in the handshake
		}
		list = append(list, Client{Conn: c.describe(), Stats: c.stats(), Inflight: c.inflight(), Size: c.size.Load(), Since: c.since})
	}
	slices.SortFunc(list, func(a, b Client) int { return int(a.ID) - int(b.ID) })
	return list
}

// ExportStats returns what all connections of an export that was added to the server did, those that have ended included.
func (s *Server) ExportStats(name string) Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.exports[name]
	if x == nil {
		return Stats{}
	}
	sum := x.past
	for c := range x.conns {
		sum.add(c.stats())
	}
	return sum
}

// Disconnect asks the connections that match to end as Shutdown does, and returns how many they are. It does not wait for
// them.
func (s *Server) Disconnect(match func(Conn) bool) int {
	s.mu.Lock()
	var list []*conn
	for c := range s.conns {
		if c.exp != nil && match(c.describe()) {
			list = append(list, c)
		}
	}
	s.mu.Unlock()
	for _, c := range list {
		c.drain()
	}
	return len(list)
}
