package guard_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/hooks/guard"
)

// patience bounds what a test waits for; nothing is asserted about speed.
const patience = 10 * time.Second

var (
	connect = []byte{0x10, 12, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 0}
	pingreq = []byte{0xc0, 0}
)

// blocking is a connection whose Read waits.
type blocking struct{ *guard.Conn }

func (b blocking) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	for ; errors.Is(err, guard.ErrNothingReady); n, err = b.Conn.Read(p) {
		if ok, err := b.Next(); err != nil {
			return 0, err
		} else if !ok {
			b.Wait()
		}
	}
	return n, err
}

// serve starts a listener on a free port; it is closed with the test.
func serve(t *testing.T, g *guard.Guard, establish func(id string, c blocking) error) *guard.Listener {
	t.Helper()
	l := g.Listener("tcp", "127.0.0.1:0")
	if err := l.Init(); err != nil {
		t.Fatal(err)
	}
	go l.Serve(func(id string, c *guard.Conn) error { return establish(id, blocking{c}) })
	t.Cleanup(func() { l.Close() })
	return l
}

func dial(t *testing.T, l *guard.Listener) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", l.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

func send(t *testing.T, c net.Conn, p ...byte) {
	t.Helper()
	if _, err := c.Write(p); err != nil {
		t.Fatal(err)
	}
}

// wantClosed fails unless the peer closes the connection without a further byte.
func wantClosed(t *testing.T, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	var timeout net.Error
	if n != 0 || err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("read %d bytes, %v; want the connection closed", n, err)
	}
}

// admit reads the CONNECT packet, admits the client and then echoes what it sends.
func admit(_ string, c blocking) error {
	if _, err := io.ReadFull(c, make([]byte, len(connect))); err != nil {
		return err
	}
	c.Conn.Admit("v7")
	for p := make([]byte, 4096); ; {
		n, err := c.Read(p)
		if err != nil {
			return err
		}
		if _, err := c.Write(p[:n]); err != nil {
			return err
		}
	}
}

func metric(t *testing.T, r *prometheus.Registry, want string) {
	t.Helper()
	name, _, _ := strings.Cut(want, " ")
	name, _, _ = strings.Cut(name, "{")
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		var text bytes.Buffer
		families, gatherErr := r.Gather()
		if gatherErr != nil {
			t.Fatal(gatherErr)
		}
		for _, f := range families {
			if f.GetName() == name {
				text.WriteString("# HELP " + name + " " + f.GetHelp() + "\n# TYPE " + name + " " + strings.ToLower(f.GetType().String()) + "\n")
			}
		}
		text.WriteString(want + "\n")
		if err = testutil.GatherAndCompare(r, &text, name); err == nil {
			return
		}
	}
	t.Error(err)
}

func TestConnectionPassesBytesThrough(t *testing.T) {
	l := serve(t, guard.New(guard.Options{}), admit)
	c := dial(t, l)
	send(t, c, connect...)
	publish := append([]byte{0x30, 0xe8, 0x07, 0, 1, 't'}, bytes.Repeat([]byte{'x'}, 997)...)
	send(t, c, publish[:700]...)
	send(t, c, publish[700:]...)
	got := make([]byte, len(publish))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, publish) {
		t.Fatalf("echo differs: %v", err)
	}
}

// The server reads in large pieces. What follows CONNECT in the same segment must not count
// against the limit before authentication, nor reach the server before it.
func TestReadStopsAtTheEndOfConnect(t *testing.T) {
	read := make(chan int, 1)
	l := serve(t, guard.New(guard.Options{MaxPacketSize: 1 << 20}), func(_ string, c blocking) error {
		n, p := 0, make([]byte, 4096)
		for n < len(connect) {
			i, err := c.Read(p)
			if err != nil {
				return err
			}
			n += i
		}
		c.Conn.Admit("v7")
		read <- n
		m, err := io.CopyN(io.Discard, c, 100_004)
		read <- int(m)
		return err
	})
	c := dial(t, l)
	publish := append([]byte{0x30, 0xa0, 0x8d, 0x06, 0, 1, 't'}, make([]byte, 99_997)...) // 100,000 > 64 KiB
	send(t, c, append(bytes.Clone(connect), publish...)...)
	if n := <-read; n != len(connect) {
		t.Errorf("server read %d bytes before it admitted the client, want %d", n, len(connect))
	}
	if n := <-read; n != len(publish) {
		t.Errorf("server read %d bytes of the publish, want %d", n, len(publish))
	}
}

func TestRefusedFrames(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		send         []byte
	}{
		{"no connect", "not_connect", pingreq},
		{"connect too large", "connect_too_large", []byte{0x10, 0x80, 0x80, 0x04}},
		{"publish too large", "too_large", append(bytes.Clone(connect), 0x30, 0x80, 0x80, 0x40)},
		{"reserved type", "packet_type", append(bytes.Clone(connect), 0)},
		{"malformed length", "malformed_length", append(bytes.Clone(connect), 0x30, 0x80, 0x80, 0x80, 0x80)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := prometheus.NewRegistry()
			g := guard.New(guard.Options{MaxPacketSize: 1 << 20, Registerer: r})
			failed := make(chan error, 1)
			l := serve(t, g, func(id string, conn blocking) error {
				err := admit(id, conn)
				failed <- err
				return err
			})
			conn := dial(t, l)
			send(t, conn, c.send...)
			var fe *guard.FrameError
			if err := <-failed; !errors.As(err, &fe) || string(fe.Reason) != c.reason {
				t.Errorf("server got %v, want reason %s", err, c.reason)
			}
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) {
				t.Error("connection was not closed")
			}
			var want strings.Builder
			for _, reason := range []string{"not_admitted", "connect_too_large", "malformed", "malformed_length", "not_connect", "packet_type", "protocol_error", "too_large"} {
				n := "0"
				if reason == c.reason {
					n = "1"
				}
				want.WriteString("throughline_frames_refused_total{reason=\"" + reason + "\"} " + n + "\n")
			}
			metric(t, r, strings.TrimSuffix(want.String(), "\n"))
		})
	}
}

// Ops learn which vehicle sends too much; strangers don't get to write the log.
func TestRefusedFrameOfAClientIsLogged(t *testing.T) {
	var log syncBuffer
	r := prometheus.NewRegistry()
	g := guard.New(guard.Options{MaxPacketSize: 1 << 20, Registerer: r, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	l := serve(t, g, admit)
	for range 3 {
		send(t, dial(t, l), append(bytes.Clone(connect), 0x30, 0x80, 0x80, 0x40)...)
		send(t, dial(t, l), pingreq...)
	}
	metric(t, r, "throughline_connections 0")
	metric(t, r, "throughline_connections_accepted_total 6")
	if n := strings.Count(log.String(), "level="); n != 1 || !strings.Contains(log.String(), "client=v7") ||
		!strings.Contains(log.String(), "packet type 3 has 1048580 bytes or more, at most 1048576 are allowed") {
		t.Errorf("want one line about the client's frame:\n%s", log.String())
	}
}

func TestNothingIsReadBeforeAdmission(t *testing.T) {
	got := make(chan error, 1)
	l := serve(t, guard.New(guard.Options{}), func(_ string, c blocking) error {
		if _, err := io.ReadFull(c, make([]byte, len(connect))); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		got <- err
		return err
	})
	c := dial(t, l)
	send(t, c, append(bytes.Clone(connect), pingreq...)...)
	var fe *guard.FrameError
	if err := <-got; !errors.As(err, &fe) || fe.Reason != guard.NotAdmitted {
		t.Errorf("got %v, want a refusal", err)
	}
}

func TestPanicEndsItsConnectionAlone(t *testing.T) {
	var log syncBuffer
	r := prometheus.NewRegistry()
	g := guard.New(guard.Options{Registerer: r, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	l := serve(t, g, func(id string, c blocking) error {
		p := make([]byte, len(connect)+2)
		if _, err := io.ReadFull(c, p[:len(connect)]); err != nil {
			return err
		}
		c.Conn.Admit("v7")
		for {
			if _, err := io.ReadFull(c, p[:2]); err != nil {
				return err
			}
			if p[0] == 0xe0 {
				panic("index out of range")
			}
			if _, err := c.Write(p[:2]); err != nil {
				return err
			}
		}
	})
	other := dial(t, l)
	send(t, other, connect...)
	for range 2 {
		c := dial(t, l)
		send(t, c, connect...)
		send(t, c, 0xe0, 0)
		wantClosed(t, c)
	}
	send(t, other, pingreq...)
	if _, err := io.ReadFull(other, make([]byte, 2)); err != nil {
		t.Errorf("the other connection ended: %v", err)
	}
	metric(t, r, "throughline_connection_panics_total 2")
	metric(t, r, "throughline_connections 1")
	if n := strings.Count(log.String(), "index out of range"); n != 1 {
		t.Errorf("the panic was logged %d times, want once", n)
	}
	if !strings.Contains(log.String(), "guard_test.go") || !strings.Contains(log.String(), "client=v7") {
		t.Errorf("log has no stack or no client:\n%s", log.String())
	}
}

func TestConnectTimeout(t *testing.T) {
	for _, c := range []struct {
		name string
		send []byte
	}{
		{"silent", nil},
		{"header alone", connect[:2]},
		{"all but a byte", connect[:len(connect)-1]},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := prometheus.NewRegistry()
			l := serve(t, guard.New(guard.Options{ConnectTimeout: 50 * time.Millisecond, Registerer: r}), admit)
			conn := dial(t, l)
			if len(c.send) > 0 {
				send(t, conn, c.send...)
			}
			wantClosed(t, conn)
			metric(t, r, "throughline_connect_timeouts_total 1")
		})
	}
}

func TestMaxConnections(t *testing.T) {
	var log syncBuffer
	r := prometheus.NewRegistry()
	g := guard.New(guard.Options{MaxConnections: 2, Registerer: r, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	a, b := serve(t, g, admit), serve(t, g, admit) // the bound holds over all listeners
	first, second := dial(t, a), dial(t, b)
	metric(t, r, "throughline_connections 2")
	for range 3 {
		wantClosed(t, dial(t, a))
	}
	metric(t, r, "throughline_connections_refused_total 3")
	first.Close()
	metric(t, r, "throughline_connections 1")
	third := dial(t, b)
	for _, c := range []net.Conn{second, third} {
		send(t, c, append(bytes.Clone(connect), pingreq...)...)
		if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
			t.Errorf("an accepted connection does not work: %v", err)
		}
	}
	if n := strings.Count(log.String(), "max_connections is reached"); n != 1 {
		t.Errorf("refusing was logged %d times, want once:\n%s", n, log.String())
	}
}

// Out of file descriptors, accept fails at once, again and again.
func TestAcceptErrorsPauseAndDontEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		g := guard.New(guard.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		socket := &failingSocket{failures: 100, conns: make(chan net.Conn)}
		l := g.ListenerOn("tcp", socket)
		established := make(chan struct{})
		ended := make(chan struct{})
		go func() {
			l.Serve(func(string, *guard.Conn) error { close(established); return nil })
			close(ended)
		}()
		begin := time.Now()
		client, server := net.Pipe()
		defer client.Close()
		socket.conns <- server
		<-established
		// 5, 10, ... 640 ms are eight pauses; the other 92 are a second each.
		if took, want := time.Since(begin), 1275*time.Millisecond+92*time.Second; took != want {
			t.Errorf("a hundred failures took %v, want %v", took, want)
		}
		if n := strings.Count(log.String(), "accept failed"); n != 1 {
			t.Errorf("one failure was logged %d times", n)
		}
		l.Close()
		<-ended
	})
}

type failingSocket struct {
	failures int
	conns    chan net.Conn
	closed   atomic.Bool
}

func (s *failingSocket) Accept() (net.Conn, error) {
	if s.failures > 0 {
		s.failures--
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	c, ok := <-s.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (s *failingSocket) Close() error {
	if !s.closed.Swap(true) {
		close(s.conns)
	}
	return nil
}

func (s *failingSocket) Addr() net.Addr { return &net.TCPAddr{} }

// The peer sends on and reads late. A plain close would reset the connection, and the last packet would be lost.
func TestLastPacketArrivesThoughThePeerSendsOn(t *testing.T) {
	disconnect := []byte{0xe0, 2, 0x8b, 0}
	admitted := make(chan struct{})
	l := serve(t, guard.New(guard.Options{}), func(_ string, c blocking) error {
		if _, err := io.ReadFull(c, make([]byte, len(connect))); err != nil {
			return err
		}
		c.Conn.Admit("v7")
		close(admitted)
		return c.Conn.CloseWith(disconnect, time.Now().Add(patience))
	})
	c := dial(t, l)
	send(t, c, append(bytes.Clone(connect), bytes.Repeat(pingreq, 1000)...)...)
	<-admitted
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, disconnect) {
		t.Errorf("peer read %x, %v; want %x", got, err, disconnect)
	}
}

func TestCloseWithIsBoundedThoughThePeerDoesNotRead(t *testing.T) {
	stuck, read := make(chan *guard.Conn, 1), make(chan error, 1)
	l := serve(t, guard.New(guard.Options{}), func(_ string, c blocking) error {
		if _, err := io.ReadFull(c, make([]byte, len(connect))); err != nil {
			return err
		}
		c.Conn.Admit("v7")
		c.SetKeepalive(0)
		if _, err := c.Write(bytes.Repeat(pingreq, 16<<20)); err != nil { // more than the sockets' buffers take
			return err
		}
		stuck <- c.Conn
		_, err := c.Read(make([]byte, 1))
		c.SetKeepalive(0) // must not take back that it is closed
		_, again := c.Read(make([]byte, 1))
		read <- errors.Join(err, again)
		return err
	})
	c := dial(t, l)
	send(t, c, connect...)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil { // the write is under way
		t.Fatal(err)
	}
	conn := <-stuck
	if err := conn.CloseWith([]byte{0xe0, 0}, time.Now().Add(50*time.Millisecond)); err != nil {
		t.Error(err)
	}
	if _, err := conn.Write(pingreq); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after close: %v, want net.ErrClosed", err)
	}
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after close: %v, want net.ErrClosed", err)
	}
	l.StopAccepting()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := l.Drain(ctx); err != nil {
		t.Error(err)
	}
}

func TestCloseEndsAllConnections(t *testing.T) {
	l := serve(t, guard.New(guard.Options{}), admit)
	silent, connected := dial(t, l), dial(t, l)
	send(t, connected, append(bytes.Clone(connect), pingreq...)...)
	if _, err := io.ReadFull(connected, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	for len(l.Conns()) != 2 {
		time.Sleep(time.Millisecond)
	}
	l.Close()
	wantClosed(t, silent)
	wantClosed(t, connected)
	if _, err := net.Dial("tcp", l.Address()); err == nil {
		t.Error("the address is still open")
	}
	if n := len(l.Conns()); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

func TestDrain(t *testing.T) {
	l := serve(t, guard.New(guard.Options{}), admit)
	c := dial(t, l)
	send(t, c, append(bytes.Clone(connect), pingreq...)...)
	if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	l.StopAccepting()
	l.StopAccepting()

	soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := l.Drain(soon); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain with a connection left: %v", err)
	}
	wantClosed(t, c)
	later, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := l.Drain(later); err != nil {
		t.Errorf("Drain without connections: %v", err)
	}
}

func TestInitSaysWhichListener(t *testing.T) {
	g := guard.New(guard.Options{})
	l := serve(t, g, admit)
	err := g.Listener("second", l.Address()).Init()
	if err == nil || !strings.Contains(err.Error(), `open listener "second"`) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v", err)
	}
}
