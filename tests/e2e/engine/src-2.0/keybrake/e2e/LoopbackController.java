package keybrake.e2e;

import io.grpc.ServerBuilder;
import io.grpc.netty.NettyServerBuilder;
import io.kestra.controller.DefaultController;
import io.kestra.controller.config.ControllerConfiguration;
import io.kestra.controller.config.GrpcConfiguration;
import io.kestra.controller.grpc.InternalCallServerInterceptor;
import io.kestra.controller.grpc.WorkerControllerService;
import io.kestra.core.metrics.MetricRegistry;
import io.kestra.core.server.ServiceStateChangeEvent;
import io.micronaut.context.event.ApplicationEventPublisher;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.util.List;

/** Kestra's controller listens on all addresses, in plain text, and has no setting for the address. */
final class LoopbackController extends DefaultController {
    private final List<WorkerControllerService> services;

    LoopbackController(
        List<WorkerControllerService> services,
        GrpcConfiguration grpc,
        ControllerConfiguration controller,
        MetricRegistry metrics,
        ApplicationEventPublisher<ServiceStateChangeEvent> events) {
        super(services, grpc, controller, metrics, events);
        this.services = services;
    }

    @Override
    protected ServerBuilder<?> buildServer(int port) {
        NettyServerBuilder server = NettyServerBuilder
            .forAddress(new InetSocketAddress(InetAddress.getLoopbackAddress(), port), createServerCredentials())
            .intercept(new InternalCallServerInterceptor())
            .addService(healthStatusManager.getHealthService())
            .maxInboundMessageSize(grpcConfiguration.maxInboundMessageSize());
        services.forEach(service -> server.addService(service.bindService()));
        return server;
    }
}
