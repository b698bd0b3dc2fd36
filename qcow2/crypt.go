package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// Formats of encryption.
const (
	EncryptAES  = "aes"  // that of old images: AES-128, the passphrase itself its key; for images that exist
	EncryptLUKS = "luks" // a LUKS1 header with key slots inside the image
)

var (
	// ErrNoKey is returned by reads and writes of data in an encrypted image that was opened without its key.
	ErrNoKey = errors.New("image is encrypted and was opened without its key")
	// ErrWrongKey is returned by Open when the secret does not open the image. Legacy AES knows no wrong key: with another
	// one, everything reads as noise.
	ErrWrongKey = luks.ErrWrongKey
)

// EncryptOptions unlock an encrypted image.
type EncryptOptions struct {
	Format string // EncryptAES or EncryptLUKS, to insist; "" takes what the image says
	// Secret is the passphrase. It is not kept.
	Secret []byte
	// Limits bound what a LUKS header may cost.
	Limits luks.Limits
}

// EncryptCreateOptions encrypt a new image.
type EncryptCreateOptions struct {
	Format string // "" is EncryptLUKS
	Secret []byte
	LUKS   luks.CreateOptions // for EncryptLUKS
}

// errKeyRequired is the ErrNoKey of images that are opened by name, in QEMU's words.
type errKeyRequired struct{}

func (errKeyRequired) Error() string { return "Parameter 'encrypt.key-secret' is required for cipher" }
func (errKeyRequired) Unwrap() error { return ErrNoKey }

// encryptOptions makes EncryptOptions of those by QEMU's names. An image that will be read or written needs its key.
func encryptOptions(h *format.Header, o block.FormatOptions) (*EncryptOptions, error) {
	e := &EncryptOptions{Format: o.Options["encrypt.format"]}
	id, given := o.Options["encrypt.key-secret"]
	switch {
	case h.CryptMethod == format.CryptNone && e.Format != "":
		return e, nil // Open refuses it
	case h.CryptMethod == format.CryptNone, !given && o.NoData:
		return nil, nil
	case !given:
		return nil, errKeyRequired{}
	}
	var err error
	e.Secret, err = o.Secret(id)
	return e, err
}

// encryption is how an image is encrypted, and, when it is unlocked, what does it.
type encryption struct {
	cipher luks.SectorCipher // nil without the key
	byHost bool              // sectors are numbered by their place in the file, not on the disk
	volume *luks.Volume      // of LUKS
	keys   sync.Mutex        // held by those who change or try the key slots

	// parts excludes those who write a part of a sector, and so read and write back the rest of it, from all other writers.
	parts sync.RWMutex
	bufs  sync.Pool // *[]byte, cryptChunk long
}

// cryptChunk is how much is encrypted at a time: all that a request needs of memory.
const cryptChunk = 128 << 10

func newEncryption(method uint32) *encryption {
	e := &encryption{byHost: method == format.CryptLUKS}
	e.bufs.New = func() any { b := make([]byte, cryptChunk); return &b }
	return e
}

// openEncryption returns how an image is encrypted, nil when it is not. Without options it stays locked.
func openEncryption(ctx context.Context, file storage.File, h *format.Header, o *EncryptOptions) (*encryption, error) {
	name := map[uint32]string{format.CryptAES: EncryptAES, format.CryptLUKS: EncryptLUKS}[h.CryptMethod]
	if o != nil && o.Format != "" && o.Format != name {
		if name == "" {
			return nil, fmt.Errorf("No encryption in image header, but options specified format '%s'", o.Format) //lint:ignore ST1005 QEMU's words
		}
		return nil, fmt.Errorf("Header reported '%s' encryption format but options specify '%s'", name, o.Format) //lint:ignore ST1005 QEMU's words
	}
	if name == "" {
		return nil, nil
	}
	e := newEncryption(h.CryptMethod)
	if o == nil {
		return e, nil
	}
	var err error
	if name == EncryptAES {
		e.cipher, err = luks.NewLegacyAES(o.Secret)
		return e, err
	}
	e.volume, err = luks.Open(ctx, keyArea{h.Crypto, file}, o.Secret, o.Limits)
	if err != nil {
		return nil, fmt.Errorf("opening LUKS header at host offset %#x: %w", h.Crypto.Offset, err)
	}
	e.cipher = e.volume.Cipher()
	return e, nil
}

// keyArea is the part of an image file that holds its LUKS header and key material.
type keyArea struct {
	at *format.CryptoExt
	f  keyFile
}

type keyFile interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// place returns where n bytes at off of the area are in the file.
func (a keyArea) place(off int64, n int) (int64, error) {
	if off < 0 || uint64(off)+uint64(n) > a.at.Length || a.at.Offset > format.MaxHostOffset {
		return 0, fmt.Errorf("LUKS data of %d bytes at %#x lie outside the %d bytes of the image's encryption header", n, off, a.at.Length)
	}
	return int64(a.at.Offset) + off, nil
}

func (a keyArea) ReadAt(p []byte, off int64) (int, error) {
	at, err := a.place(off, len(p))
	if err != nil {
		return 0, err
	}
	return a.f.ReadAt(p, at)
}

func (a keyArea) WriteAt(p []byte, off int64) (int, error) {
	at, err := a.place(off, len(p))
	if err != nil {
		return 0, err
	}
	return a.f.WriteAt(p, at)
}

func (a keyArea) Sync() error { return a.f.Sync() }

// sector returns the number that a place is encrypted under.
func (e *encryption) sector(off, host int64) uint64 {
	if e.byHost {
		return uint64(host) / luks.SectorSize
	}
	return uint64(off) / luks.SectorSize
}

// wholeSectors reports whether a place begins and ends with a sector. Guest and host offset differ by whole sectors.
func wholeSectors(host int64, n int) bool { return (host|int64(n))%luks.SectorSize == 0 }

// read is readHost for encrypted images.
func (e *encryption) read(f storage.File, p []byte, off, host int64) error {
	if e.cipher == nil {
		return ErrNoKey
	}
	if wholeSectors(host, len(p)) {
		if err := storage.ReadFull(f, p, host); err != nil {
			return err
		}
		e.cipher.DecryptSectors(p, p, e.sector(off, host))
		return nil
	}
	buf := e.bufs.Get().(*[]byte)
	defer e.bufs.Put(buf)
	for len(p) > 0 {
		in := host % luks.SectorSize
		b := (*buf)[:min(roundUp(in+int64(len(p)), luks.SectorSize), cryptChunk)]
		if err := storage.ReadFull(f, b, host-in); err != nil {
			return err
		}
		e.cipher.DecryptSectors(b, b, e.sector(off-in, host-in))
		n := copy(p, b[in:])
		p, off, host = p[n:], off+int64(n), host+int64(n)
	}
	return nil
}

// ready reports whether n bytes at host can be decrypted by themselves.
func (e *encryption) ready(host int64, n int) bool { return e.cipher != nil && wholeSectors(host, n) }

// decrypt turns p, as it was read from the host, into what the guest reads. It is ready.
func (e *encryption) decrypt(p []byte, off, host int64) {
	e.cipher.DecryptSectors(p, p, e.sector(off, host))
}

// write is writeHost for encrypted images. The caller's bytes are not touched.
func (e *encryption) write(f storage.File, vec [][]byte, n, off, host int64) error {
	if e.cipher == nil {
		return ErrNoKey
	}
	if wholeSectors(host, int(n)) {
		e.parts.RLock()
		defer e.parts.RUnlock()
	} else {
		e.parts.Lock()
		defer e.parts.Unlock()
	}
	buf := e.bufs.Get().(*[]byte)
	defer e.bufs.Put(buf)
	for n > 0 {
		in := host % luks.SectorSize
		b := (*buf)[:min(roundUp(in+n, luks.SectorSize), cryptChunk)]
		most := min(n, int64(len(b))-in)
		if err := e.readEdges(f, b, in, in+most, off-in, host-in); err != nil {
			return err
		}
		vec = takeBytes(b[in:in+most], vec)
		e.cipher.EncryptSectors(b, b, e.sector(off-in, host-in))
		if err := storage.WriteFull(f, b, host-in); err != nil {
			return err
		}
		n, off, host = n-most, off+most, host+most
	}
	return nil
}

// readEdges fills the first and the last sector of b, which belongs at host, unless they lie inside [from, to) of it.
func (e *encryption) readEdges(f storage.File, b []byte, from, to, off, host int64) error {
	last := int64(len(b)) - luks.SectorSize
	if from > 0 || last == 0 && to < luks.SectorSize {
		if err := e.read(f, b[:luks.SectorSize], off, host); err != nil {
			return fmt.Errorf("reading the rest of a sector: %w", err)
		}
	}
	if to < int64(len(b)) && last > 0 {
		if err := e.read(f, b[last:], off+last, host+last); err != nil {
			return fmt.Errorf("reading the rest of a sector: %w", err)
		}
	}
	return nil
}

// takeBytes fills b from the front of vec and returns the rest.
func takeBytes(b []byte, vec [][]byte) [][]byte {
	for len(b) > 0 {
		n := copy(b, vec[0])
		b = b[n:]
		if n == len(vec[0]) {
			vec = vec[1:]
			continue
		}
		vec = append([][]byte{vec[0][n:]}, vec[1:]...) // the caller's own slice stays as it is
	}
	return vec
}

// Encrypted reports whether the image's data are encrypted, and whether they can be read and written.
func (im *Image) Encrypted() (encrypted, unlocked bool) {
	return im.crypt != nil, im.crypt != nil && im.crypt.cipher != nil
}

// AnyKeySlot stands for the first key slot that is free.
const AnyKeySlot = luks.AnySlot

// ErrNoKeySlots is returned by the operations on key slots for an image that has none.
var ErrNoKeySlots = errors.New("image is not encrypted with LUKS: it has no key slots")

// keySlots runs fn, which may take its time, with the volume; nobody else changes key slots meanwhile.
func (im *Image) keySlots(fn func(*luks.Volume) error) error {
	e := im.crypt
	if im.hdr.CryptMethod != format.CryptLUKS {
		return ErrNoKeySlots
	}
	if e.volume == nil {
		return ErrNoKey
	}
	e.keys.Lock()
	defer e.keys.Unlock()
	return fn(e.volume)
}

// AddKey makes another passphrase open the image: in the given key slot or AnyKeySlot. It returns which slot that was. A
// slot in use is overwritten only with force. Requests wait only while the slot is written, not for the work before.
func (im *Image) AddKey(ctx context.Context, slot int, secret []byte, cost luks.Cost, force bool) (int, error) {
	err := im.keySlots(func(v *luks.Volume) error {
		key, err := v.Wrap(ctx, secret, cost)
		if err != nil {
			return fmt.Errorf("making a key: %w", err)
		}
		return im.changeSlots(ctx, func(v *luks.Volume) (err error) {
			slot, err = v.StoreKey(slot, key, force)
			return err
		})
	})
	return slot, err
}

// EraseKeySlot makes the key in a slot unusable. The last one is erased only with force, and the data with it.
func (im *Image) EraseKeySlot(ctx context.Context, slot int, force bool) error {
	return im.keySlots(func(*luks.Volume) error {
		return im.changeSlots(ctx, func(v *luks.Volume) error { return v.EraseSlot(slot, force) })
	})
}

// EraseKey erases every key slot that a passphrase opens. All that are in use are erased only with force.
func (im *Image) EraseKey(ctx context.Context, secret []byte, force bool) error {
	return im.keySlots(func(v *luks.Volume) error {
		slots, err := v.SlotsOf(ctx, secret)
		if err != nil {
			return fmt.Errorf("looking for the key's slots: %w", err)
		}
		if slots == nil {
			return ErrWrongKey
		}
		return im.changeSlots(ctx, func(v *luks.Volume) error { return v.EraseSlots(slots, force) })
	})
}

// ChangeKey replaces a passphrase: the new one is in a free slot before those of the old one are erased.
func (im *Image) ChangeKey(ctx context.Context, old, secret []byte, cost luks.Cost) error {
	return im.keySlots(func(v *luks.Volume) error {
		slots, err := v.SlotsOf(ctx, old)
		if err != nil {
			return fmt.Errorf("looking for the key's slots: %w", err)
		}
		if slots == nil {
			return ErrWrongKey
		}
		key, err := v.Wrap(ctx, secret, cost)
		if err != nil {
			return fmt.Errorf("making a key: %w", err)
		}
		return im.changeSlots(ctx, func(v *luks.Volume) error {
			if _, err := v.StoreKey(luks.AnySlot, key, false); err != nil {
				return err
			}
			return v.EraseSlots(slots, false)
		})
	})
}

// changeSlots runs fn as an operation on the whole image, with a volume that writes as those do.
func (im *Image) changeSlots(ctx context.Context, fn func(*luks.Volume) error) error {
	return im.exclusive(ctx, func() error {
		v := im.crypt.volume
		v.SetStorage(keyArea{im.hdr.Crypto, exclusiveFile{im}})
		defer v.SetStorage(keyArea{im.hdr.Crypto, im.file})
		return fn(v)
	})
}

// exclusiveFile is the image file for operations inside exclusive.
type exclusiveFile struct{ im *Image }

func (f exclusiveFile) ReadAt(p []byte, off int64) (int, error) { return f.im.file.ReadAt(p, off) }

func (f exclusiveFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.im.meta.WriteNow(p, format.HostOff(off)); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f exclusiveFile) Sync() error { return f.im.meta.SyncNow() }

// prepare checks the options and returns how many bytes the image needs for them, and the method to put in its header.
func (o *EncryptCreateOptions) prepare() (method uint32, length int64, err error) {
	if o == nil {
		return format.CryptNone, 0, nil
	}
	switch o.Format {
	case EncryptAES:
		return format.CryptAES, 0, nil
	case EncryptLUKS, "":
		if err := o.LUKS.Check(); err != nil {
			return 0, 0, fmt.Errorf("%w: %w", ErrInvalidOption, err)
		}
		length, err := o.LUKS.Length()
		return format.CryptLUKS, length, err
	}
	return 0, 0, invalid("encryption format %q: only %q and %q exist", o.Format, EncryptLUKS, EncryptAES)
}

// create makes the keys of a new image, whose LUKS header, if any, goes to h.Crypto.
func (o *EncryptCreateOptions) create(ctx context.Context, file storage.File, h *format.Header) (*encryption, error) {
	if o == nil {
		return nil, nil
	}
	e := newEncryption(h.CryptMethod)
	var err error
	if h.CryptMethod == format.CryptAES {
		e.cipher, err = luks.NewLegacyAES(o.Secret)
		return e, err
	}
	e.volume, err = luks.Create(ctx, keyArea{h.Crypto, file}, o.Secret, o.LUKS)
	if err != nil {
		return nil, fmt.Errorf("writing LUKS header at host offset %#x: %w", h.Crypto.Offset, err)
	}
	e.cipher = e.volume.Cipher()
	return e, nil
}

// KeySlotsOf returns the key slots that a passphrase opens.
func (im *Image) KeySlotsOf(ctx context.Context, secret []byte) (slots []int, err error) {
	err = im.keySlots(func(v *luks.Volume) error {
		slots, err = v.SlotsOf(ctx, secret)
		return err
	})
	return slots, err
}

// Encryption describes how the image is encrypted now, nil when it is not.
func (im *Image) Encryption() (*EncryptionInfo, error) {
	t, err := im.enter()
	if err != nil {
		return nil, err
	}
	defer im.meta.Epochs.Exit(t)
	return readEncryption(im.file, im.hdr)
}
