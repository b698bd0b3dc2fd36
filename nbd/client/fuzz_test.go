package client

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"

	"github.com/droverproject/drover/nbd/internal/wire"
)

// speak has a client talk to a server that says text whatever it hears, and returns what the client made of it.
func speak(t *testing.T, text []byte, use func(net.Conn)) {
	t.Helper()
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		_, _ = theirs.Write(text) // the client may hang up in the middle
	}()
	go func() { _, _ = io.Copy(io.Discard, theirs) }()
	use(ours)
	_ = ours.Close()
}

// optionReply is an answer to an option as it goes over the wire.
func optionReply(opt wire.Option, kind wire.OptReply, data string) []byte {
	p := binary.BigEndian.AppendUint64(nil, wire.MagicOptReply)
	p = binary.BigEndian.AppendUint32(p, uint32(opt))
	p = binary.BigEndian.AppendUint32(p, uint32(kind))
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

func join(parts ...[]byte) []byte {
	var p []byte
	for _, x := range parts {
		p = append(p, x...)
	}
	return p
}

// FuzzHandshake: whatever a server says, a client that lists its exports comes to an end.
func FuzzHandshake(f *testing.F) {
	hello := []byte("NBDMAGICIHAVEOPT\x00\x03")
	sr := optionReply(wire.OptStructuredReply, wire.RepAck, "")
	name := optionReply(wire.OptList, wire.RepServer, "\x00\x00\x00\x01xa description")
	end := optionReply(wire.OptList, wire.RepAck, "")
	info := optionReply(wire.OptInfo, wire.RepInfo, "\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x01")
	sizes := optionReply(wire.OptInfo, wire.RepInfo, "\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00")
	ack := optionReply(wire.OptInfo, wire.RepAck, "")
	meta := optionReply(wire.OptListMeta, wire.RepMeta, "\x00\x00\x00\x00base:allocation")
	done := optionReply(wire.OptListMeta, wire.RepAck, "")
	f.Add(join(hello, sr, name, end, info, sizes, ack, meta, done))
	f.Add(join(hello, optionReply(wire.OptStructuredReply, wire.RepErrUnsupported, "no"), end))
	f.Add(join(hello, sr, optionReply(wire.OptList, wire.RepErrPolicy, "not for you")))
	f.Add(join(hello, sr, name, end, optionReply(wire.OptInfo, wire.RepErrUnknown, "")))
	f.Add(join([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"), make([]byte, 136)))
	f.Fuzz(func(t *testing.T, text []byte) {
		speak(t, text, func(nc net.Conn) {
			h := &handshake{nc: nc, r: newReader(nc)}
			if err := h.begin(&Dialing{}); err != nil {
				return
			}
			list, err := h.list()
			for _, e := range list {
				if err == nil && len(e.Name) > wire.MaxString {
					t.Errorf("an export with a name of %d bytes", len(e.Name))
				}
			}
		})
	})
}

// chunkBytes is a chunk as it goes over the wire.
func chunkBytes(flags, kind uint16, cookie uint64, data string) []byte {
	p := binary.BigEndian.AppendUint32(nil, wire.MagicStructured)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, kind)
	p = binary.BigEndian.AppendUint64(p, cookie)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

// FuzzReplies: whatever a server answers, each request gets an answer, and a read that succeeds was filled whole.
func FuzzReplies(f *testing.F) {
	at := func(off uint64) string { return string(binary.BigEndian.AppendUint64(nil, off)) }
	data := "0123456789abcdef"
	f.Add(join(chunkBytes(1, wire.ChunkData, 1, at(512)+data), chunkBytes(1, wire.ChunkStatus, 2, "\x00\x00\x00\x01\x00\x00\x10\x00\x00\x00\x00\x03")), true)
	f.Add(join(chunkBytes(0, wire.ChunkHole, 1, at(512)+"\x00\x00\x00\x08"), chunkBytes(0, wire.ChunkData, 1, at(520)+data[:8]),
		chunkBytes(1, wire.ChunkNone, 1, "")), true)
	f.Add(join(chunkBytes(0, wire.ChunkData, 1, at(512)+data[:8]), chunkBytes(0, wire.ChunkData, 1, at(512)+data[:8]),
		chunkBytes(1, wire.ChunkNone, 1, "")), true)
	f.Add(join(chunkBytes(1, wire.ChunkErrorAt, 1, "\x00\x00\x00\x05\x00\x03bad"+at(512)), chunkBytes(1, wire.ChunkError, 2, "\x00\x00\x00\x16\x00\x00")), true)
	f.Add(join([]byte("\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"), []byte(data)), false)
	f.Add([]byte("\x67\x44\x66\x98\x00\x00\x00\x1c\x00\x00\x00\x00\x00\x00\x00\x02"), false)
	f.Fuzz(func(t *testing.T, text []byte, structured bool) {
		speak(t, text, func(nc net.Conn) {
			c := newConn(&handshake{nc: nc, r: newReader(nc), structured: structured})
			c.context, c.hasContext = 1, structured
			p := make([]byte, 16)
			read := &request{cmd: 0, off: 512, n: 16, bufs: [][]byte{p[:5], p[5:]}, done: make(chan error, 1)}
			status := &request{cmd: 7, off: 0, n: 1 << 20, done: make(chan error, 1)}
			for _, r := range []*request{read, status} {
				if _, err := c.register(r); err != nil {
					t.Fatal(err)
				}
			}
			go c.receive()
			if err := <-read.done; err == nil && structured && read.filled != 16 {
				t.Errorf("a read succeeds with %d bytes of 16", read.filled)
			}
			if err := <-status.done; err == nil && (len(status.runs) == 0 || len(status.runs) > maxRuns) {
				t.Errorf("a block status of %d runs", len(status.runs))
			}
		})
	})
}

// TestPatience: a server that says nothing holds nobody up for longer than the context lasts.
func TestPatience(t *testing.T) {
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		if nc, err := l.Accept(); err == nil {
			cancel()
			_, _ = io.Copy(io.Discard, nc) // until the client leaves
			nc.Close()
		}
	}()
	if _, err := Open(ctx, Options{Dialing: Dialing{Address: Address{Host: host, Port: port}}}); err == nil {
		t.Error("opened something")
	}
}
