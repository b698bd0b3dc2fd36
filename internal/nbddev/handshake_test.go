package nbddev

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"
	"time"
)

// script is a connection to a server that says what it will, whatever it is asked.
type script struct {
	in  *bytes.Reader
	out bytes.Buffer
}

func (s *script) Read(p []byte) (int, error)  { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error) { return s.out.Write(p) }

// say makes a message of numbers of their sizes, strings and bytes.
func say(parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b.WriteString(p)
		case []byte:
			b.Write(p)
		default:
			if err := binary.Write(&b, binary.BigEndian, p); err != nil {
				panic(err)
			}
		}
	}
	return b.Bytes()
}

func greeting(flags uint16) []byte { return say("NBDMAGIC", "IHAVEOPT", flags) }

func answer(opt, kind uint32, data []byte) []byte {
	return say(uint64(magicReply), opt, kind, uint32(len(data)), data)
}

func exportInfo(size uint64, flags uint16) []byte {
	return answer(optGo, replyInfo, say(uint16(infoExport), size, flags))
}

func TestHandshake(t *testing.T) {
	ack := answer(optGo, replyAck, nil)
	blocks := answer(optGo, replyInfo, say(uint16(infoBlockSize), uint32(512), uint32(4096), uint32(1<<25)))
	for name, c := range map[string]struct {
		server []byte
		want   Export
		fails  string
	}{
		"go":              {say(greeting(3), exportInfo(1<<30, 0x16d), ack), Export{1 << 30, 0x16d, 0}, ""},
		"go with blocks":  {say(greeting(3), blocks, exportInfo(512, 3), ack), Export{512, 3, 512}, ""},
		"unknown info":    {say(greeting(3), answer(optGo, replyInfo, say(uint16(99), "x")), exportInfo(5, 1), ack), Export{5, 1, 0}, ""},
		"no go":           {say(greeting(3), answer(optGo, errUnsup, nil), uint64(7), uint16(0x21)), Export{7, 0x21, 0}, ""},
		"no go, zeroes":   {say(greeting(1), answer(optGo, errUnsup, nil), uint64(7), uint16(1), make([]byte, 124)), Export{7, 1, 0}, ""},
		"not fixed":       {say(greeting(0), uint64(9), uint16(1), make([]byte, 124)), Export{9, 1, 0}, ""},
		"cut off":         {say(greeting(0), uint64(9)), Export{}, "hung up"},
		"hangs up":        {say(greeting(0)), Export{}, "hung up"},
		"refuses":         {say(greeting(3), answer(optGo, replyError|6, []byte("no"))), Export{}, `refuses (error 6): "no"`},
		"wants TLS":       {say(greeting(3), answer(optGo, errTLSNeeded, nil)), Export{}, "TLS"},
		"old server":      {say("NBDMAGIC", uint64(0x420281861253), uint16(0)), Export{}, "no NBD server of today"},
		"another server":  {[]byte("SSH-2.0-OpenSSH_9.2p1 Debian"), Export{}, "no NBD server"},
		"says nothing":    {nil, Export{}, "EOF"},
		"no info":         {say(greeting(3), ack), Export{}, "does not say"},
		"no flags":        {say(greeting(3), exportInfo(512, 0), ack), Export{}, "what the export can do"},
		"too long":        {say(greeting(3), exportInfo(1<<63, 1), ack), Export{}, "longer than"},
		"talks for ever":  {say(greeting(3), bytes.Repeat(blocks, maxReplies)), Export{}, "to the point"},
		"big answer":      {say(greeting(3), say(uint64(magicReply), uint32(optGo), uint32(1), uint32(1<<31))), Export{}, "understood"},
		"another's reply": {say(greeting(3), answer(optExportName, replyAck, nil)), Export{}, "understood"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &script{in: bytes.NewReader(c.server)}
			got, err := Handshake(s, "disk")
			switch {
			case c.fails == "" && (err != nil || got != c.want):
				t.Errorf("got %+v, %v, want %+v", got, err, c.want)
			case c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)):
				t.Errorf("got %+v, %v, want an error with %q", got, err, c.fails)
			}
			if rest, _ := io.ReadAll(s); c.fails == "" && len(rest) > 0 {
				t.Errorf("%d bytes are left, which the kernel would take for a reply", len(rest))
			}
		})
	}
	s := &script{in: bytes.NewReader(say(greeting(3), exportInfo(1<<20, 1), ack))}
	if _, err := Handshake(s, "disk"); err != nil {
		t.Fatal(err)
	}
	want := say(uint32(3), "IHAVEOPT", uint32(optGo), uint32(12), uint32(4), "disk", uint16(1), uint16(infoBlockSize))
	if !bytes.Equal(s.out.Bytes(), want) {
		t.Errorf("the client says % x, want % x", s.out.Bytes(), want)
	}
	if _, err := Handshake(&script{in: bytes.NewReader(nil)}, strings.Repeat("x", maxName+1)); err == nil {
		t.Error("a name of any length is sent")
	}
}

func FuzzHandshake(f *testing.F) {
	f.Add(say(greeting(3), exportInfo(1<<30, 0x16d), answer(optGo, replyAck, nil)))
	f.Add(say(greeting(0), uint64(9), uint16(1), make([]byte, 124)))
	f.Fuzz(func(t *testing.T, server []byte) {
		x, err := Handshake(&script{in: bytes.NewReader(server)}, "")
		if err == nil && (x.Size < 0 || x.Flags&1 == 0) {
			t.Errorf("accepted %+v", x)
		}
	})
}

func TestConfigCheck(t *testing.T) {
	for _, c := range []Config{{Size: -1}, {BlockSize: 1000}, {BlockSize: 8192}, {BlockSize: 256}, {Timeout: -time.Second}} {
		if c.Check() == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
	for _, c := range []Config{{}, {Size: 1, BlockSize: 4096}} {
		if err := c.Check(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
